"""The only place that knows Ray: where the roles run, how a run starts, and the cluster it runs on."""
