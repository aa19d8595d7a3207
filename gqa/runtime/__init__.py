"""What any program needs around the network: errors, files, signals, hardware, sharding."""
