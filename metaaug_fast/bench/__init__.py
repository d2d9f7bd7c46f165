"""The benchmark suite: `metaaug-fast bench`.

`workloads.py` says what is timed, `rivals.py` and `jax_rival.py` how each library's users write it. `harness.py` runs
every rival in a process of its own (`worker.py`), checks it (`check.py`) and gives it a `row.py`. `operations.py` and
`ceilings.py` give the roofline, `report.py` and `pictures.py` show the result; `suite.py` and `scaling.py` are runs.
"""
