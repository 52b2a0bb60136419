"""How the embedded bases are trained: `python -m tools.emoji_base --help` lists the stages.

Two bases draw the same catalogue: `emoji`, a small Stable Diffusion, and `emoji-dit`, a small Stable Diffusion 3.
Nothing here is part of the installed package; the finished folders are.
"""
