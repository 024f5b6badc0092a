"""The mathematics of diffusion, in torch and numpy only: no models, no input or output, no Ray."""
