"""Every operation in plain JAX: any compute type, any platform."""
