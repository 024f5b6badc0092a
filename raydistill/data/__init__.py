"""Data: COCO-format folders, webdataset shards made from them, and the reader that feeds training."""
