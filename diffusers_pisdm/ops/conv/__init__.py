"""The depthwise causal convolution: one public function, and a file for each backend."""
