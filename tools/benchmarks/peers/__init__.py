"""Ways to train a model, each as a program that trains when it is told to: see :mod:`benchmarks.peers.serve`."""
