"""The service over gRPC: the same app as over HTTP, asked through messages.

A call becomes a request to the ASGI app whose body is the message's bytes (`bridge`): key, limits, deadline, versions,
log and metrics are the very same code. `server` listens, in a process of its own; on Ray Serve its gRPC proxies do,
with `rayemb.serve.rpc.server.add_servicer` among the `grpc_servicer_functions` of the Serve config.
"""
