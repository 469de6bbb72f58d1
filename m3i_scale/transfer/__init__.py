"""Evaluation and export of pre-trained networks.

    loading.py       configuration and checkpoint -> plain networks
    features.py      samples -> features; captions -> embeddings
    parts.py         an evaluation divided among ranks
    labels.py        the right answers, and the accuracy of chance
    zero_shot.py     nearest caption; the pre-trained category classifier
    knn.py           weighted nearest neighbours
    linear_probe.py  logistic regression on frozen features
    evaluation.py    all tasks, trained beside untrained networks: the table of `m3i eval`
    pictures.py      retrieval.png, curves.png
    export.py        one safetensors file per model, and the backbone that it describes
    tensor_file.py   writing safetensors piece by piece
    folder.py        a folder per library: weights, configuration, model card
    formats.py       names and configurations of timm and transformers
    card.py          the model card
    onnx_file.py     a backbone as an ONNX graph
    push.py          the Hugging Face Hub
    commands.py      `m3i eval`, `m3i export`, `m3i push`

Pre-training evaluates itself by evaluation.py while it goes on (`m3i_scale.tasks.learned`).

Only commands.py imports the engine. Functions take a checkpoint as `loading.Weights`, a protocol
that `m3i_scale.engine.checkpoint.CheckpointReader` follows; commands.py joins the two.
"""
