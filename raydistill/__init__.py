"""Distils many-step diffusion models into few-step generators, with Ray.

Importing this imports nothing else; each part has a module of its own.
"""

__version__ = "0.1.0"
