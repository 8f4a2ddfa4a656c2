"""What the Flex template's launcher runs (FLEX_TEMPLATE_PYTHON_PY_FILE): see retrodb/pipelines/launch.py."""

from retrodb.pipelines.launch import main

main()
