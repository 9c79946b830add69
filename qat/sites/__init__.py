"""Sites: the places where a tensor may be quantized, how quantizers get there, and what they cost."""
