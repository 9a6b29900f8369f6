"""The operations of a depth (interface.py) and the implementations that compute them on each platform."""
