"""Files that start ``llamamoe pretrain`` on several GPUs and nodes."""
