"""`fxsparse demo`: a small CNN on real images, from training to a fast pruned model.

Everything here uses fxsparse as a user would, through its public names; net and training are plain torch.
"""
