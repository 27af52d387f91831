"""The task IR: types, values, nodes, graphs and programs; text, JSON and safetensors forms; the verifier."""
