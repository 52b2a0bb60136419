"""How the embedded base was made: a tiny CLIP first, then the autoencoder, then the U-Net on its latents, and a judge.

`python -m overpaint.bases.emoji.training --help` lists the stages. The trained files ship with the package; nothing
here runs unless somebody retrains.
"""
