"""First contact with a GPU: build, test and time the CUDA kernels, whatever fails on the way.

In reading order: `stages` is the plan, `__main__` carries it out, `supervisor` runs a stage as a
process under time limits, `worker` is that process, `case` what it runs, `journal` the file in
which both write what happened; `report` makes results.json and the summary. The other modules hold
the cases of a stage each, but for `settings`, `target` and `sanitizer`, which they share.
"""
