"""Every architecture that builds offline, shrunk: does discovery find its sub-layers, and do adapters fit?"""
