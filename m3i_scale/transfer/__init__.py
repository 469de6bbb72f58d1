"""What the pre-trained networks are worth, and how they leave: evaluation and export.

    loading.py       configuration and checkpoint -> plain networks
    features.py      samples -> features; captions -> embeddings
    labels.py        what counts as the right answer, and what chance gives
    zero_shot.py     nearest caption; the pre-trained category classifier
    knn.py           weighted nearest neighbours
    linear_probe.py  logistic regression on frozen features
    evaluation.py    all of these, trained beside untrained: the table of `m3i eval`
    pictures.py      retrieval.png, curves.png
    export.py        one safetensors file per model

Imports models, objective, data and config, never the engine: imports go one way,
`cli -> engine, transfer -> objective -> models -> m3i_kernels`. A checkpoint comes in as a
`loading.Weights`, which `m3i_scale.engine.checkpoint.CheckpointReader` is; `cli.py` brings the two
together.
"""
