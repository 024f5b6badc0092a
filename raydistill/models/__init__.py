"""Networks behind one contract, `Denoiser`: (x_t, t, cond) -> x0."""
