"""``python -m retrodb``: the command line."""

from retrodb.cli import main

if __name__ == "__main__":
    main()
