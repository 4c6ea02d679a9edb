"""`tandem dashboard`: a page that shows a run, live or ended, out of the files of its directory, and scales it.

    files of RUN -> readers (history, steps, overview, rollouts) -> app (JSON) -> static/ (the page)

Served by `tandem dashboard RUN`, or by the launcher beside the run. Nobody gets in without the token of this server's
start (`access.py`). Imports nothing at its own import.
"""
