"""How much robustness survives fine-tuning: the protocol of ImageNet-RIB (Hwang et al. 2024, arXiv 2410.21582)."""
