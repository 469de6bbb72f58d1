"""The backbones in other people's libraries, and other people's weights in ours.

    hf.py           InternImage for transformers: `import m3i_scale.integrations.hf` registers it
    timm_models.py  InternImage for timm: `import m3i_scale.integrations.timm_models` registers it
    folders.py      weights in files, folders and on the Hub, read without executing anything
    vit_names.py    ViTs of timm and transformers under the names of `m3i_scale.models.vit`
    initial.py      `model.init`: what a run starts from, what of it fits, and what is new
    foreign.py      networks of timm and transformers that see images, built from descriptions
    frozen.py       `model.frozen_teachers`: weights with the network they are of, as targets

The package imports models and config, never objective, engine or transfer; `train.py` hands what
`initial.py` found to the engine.
"""
