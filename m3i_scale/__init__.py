"""Single-stage multi-modal pre-training (M3I) of billion-parameter image backbones."""
