"""Models as ONNX graphs with QuantizeLinear and DequantizeLinear at every affine site."""
