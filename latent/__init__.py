"""Latent diffusion: Stable Diffusion by LoRA, and text to image from scratch."""
