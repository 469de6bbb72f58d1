"""The objective: inputs, target groups, likelihoods, the M3I module, balance, momentum rule.

The package consists of functions of tensors and plain modules. It uses torch.distributed for the
global softmax, and neither DeepSpeed nor files nor data loading.

=====================  ==========================================================================
Term of the method     Place
=====================  ==========================================================================
x = mix of two images  `inputs.build_input` (block mask: `masks.PatchMask`)
z_x = f_theta(x)       `m3i.M3I.forward`: the student backbone's features
z_y = f_phi(y)         `m3i.M3I.target_outputs`: teacher (or student), text tower
z_hat_y = f_psi(..)    `m3i.M3I.predict_*`: image decoder, pooling and projections
pairing of tokens      `roles`: tokens of each image, patches of the other view under them
-log P(z_y | z_hat_y)  `terms`, from `likelihoods`; negatives: `softmax`, of earlier batches
                       `key_queue`, of other micro-batches `step_loss`
L_SSP + lambda L_SP    `m3i.M3I.forward`; lambda: `balance.LossBalance`
theta' <- EMA          `momentum.ema_coefficient`
signs of collapse      `collapse`: spread, effective rank, use of the mask tokens
=====================  ==========================================================================
"""
