"""The depthwise causal convolution: one public function, one file per backend."""
