"""The layers that hold packed weights, and the products that they compute."""
# How a layer multiplies: by the values of its weight; with codes of fewer bits, as the weight's
# makers meant it, where comfy_kitchen has the kernels; with codes wherever there are kernels.
EXACT, AUTOMATIC, FAST = "exact", "automatic", "fast"
INT8 = "int8"  # FAST in what earlier versions saved and pickled
