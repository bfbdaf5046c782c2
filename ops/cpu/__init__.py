"""What a CPU computes faster another way: attention, convolutions, linear layers."""
