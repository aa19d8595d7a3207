"""The network: the definition of grouped-query attention, the layers around it, T5, its FLOPs."""
