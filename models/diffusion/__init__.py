"""Rectified flow: noise levels, training objective, samplers, guidance; for any network that speaks velocity."""
