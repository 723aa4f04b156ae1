"""The mathematics of the methods: tensors in, tensors out, no state and no modules."""
