"""What a run needs before it is started: memory, bytes on the wire, hours. Arithmetic from the model's shapes."""
