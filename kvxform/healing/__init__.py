"""Healing: training of what lossy structure passes touched, against the source model.

- `running`: a program as a differentiable function of its weights
- `reads`: what attention reads of streams that are cut short
- `blocks`: the attention of each layer as a graph of its own, between residual streams
- `parameters`: what is trained, in full or by low-rank additions, and how it is put back
- `checkpoints`: the state of a run in one file
- `training`: stages, steps, schedule
- `healer`: the two stages on one program, measured before and after
"""
