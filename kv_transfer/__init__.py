"""Moving KV blocks between the pools of two processes.

exporter.PoolExporter makes a pool readable; readers.ReaderPool opens and keeps readers of peers;
convert turns both ends' descriptions into messages and back.
"""
