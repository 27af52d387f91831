"""Running compiled programs: modules, thunks, training steps, state on workers, checkpoints."""
