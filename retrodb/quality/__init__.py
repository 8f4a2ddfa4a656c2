"""How good a database is, and whether it is what it says.

`recall` measures the index against exact search in every build and chooses the cheapest search that reaches the gate;
`leakage` measures how much of a chunk its neighbours give away; `summary` is what ``retrodb info`` answers.

`verify` proves the design's invariants on a finished database, or on as much of it as there is. A `Problem` names one
file and what is wrong with it; a `VerifyReport` holds them, what was looked at, and notes. The steps are modules of
their own, which share a `scene.Scene`: the database, what it was made with (`scene.Facts`), the shards still trusted,
and bounded caches of the chunks that others refer to. A shard with a problem is trusted no more, so that what depends
on it is not blamed for it.

    files -> content -> index_content -> neighbour_content -> training_content -> leakage_content -> recompute
"""
