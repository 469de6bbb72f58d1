"""What is learned: inputs, target groups, likelihoods, the M3I module, balance, momentum rule.

Pure functions of tensors and plain modules; knows torch.distributed for the global softmax, and
nothing of DeepSpeed, files or data loading.

=====================  ==========================================================================
Term of the method     Place
=====================  ==========================================================================
x = mix of two images  `inputs.build_input` (block mask: `masks.PatchMask`)
z_x = f_theta(x)       `m3i.M3I.forward`: the student backbone's features
z_y = f_phi(y)         `m3i.M3I.target_outputs`: teacher (or student), text tower
z_hat_y = f_psi(..)    `m3i.M3I.predict_*`: image decoder, pooling and projections
which goes with which  `roles`: tokens of each image, patches of the other view under them
-log P(z_y | z_hat_y)  `terms`, from `likelihoods`; negatives of batches before: `key_queue`
L_SSP + lambda L_SP    `m3i.M3I.forward`; lambda: `balance.LossBalance`
theta' <- EMA          `momentum.ema_coefficient`
is it collapsing?      `collapse`: spread, effective rank, use of the mask tokens
=====================  ==========================================================================
"""
