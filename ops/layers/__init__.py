"""The layers that hold packed weights, and the products that they compute."""
