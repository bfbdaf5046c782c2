"""What Wine lacks of Windows: C's functions of complex numbers (numpy imports them), ProcessPrng
(programs in Rust, such as safetensors, call it), and a Zig that runs."""
