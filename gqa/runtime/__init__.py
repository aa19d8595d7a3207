"""Everything around the network that any program needs: errors, files, signals, sharding."""
