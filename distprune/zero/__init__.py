"""The only folder that knows DeepSpeed's internals: where each rank's weights, moments and gradients lie."""
