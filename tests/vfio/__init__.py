"""Real PCI devices through VFIO, in a machine with an emulated IOMMU."""
