// Package serviceip gives Services their cluster addresses and node ports.
//
// Wiring, after the Store of services is complete:
//
//	ips, err := serviceip.New(serviceip.Config{
//		CIDRs: cfg.ServiceCIDRs, // first is the default family
//		Log:   log,
//	})
//	if err := ips.Attach(serviceStore); err != nil { ... } // before copying it for services/status
//	statusStore := *serviceStore
//	group.Go(func() error { return ips.Run(ctx) })
//
// Attach sets BeginCreate and BeginUpdate and wraps the storage below the
// store. Nothing has to be started first: the first write reads the stored
// services. ips.First() is the address of the service default/kubernetes.
//
// # What is true
//
// The stored Services are the only truth; there is no allocation map beside
// them that could disagree. A [Pool] in memory says which address or port is
// held by which Service (by UID). It is filled from a consistent list before
// the first write is let through, and afterwards only follows writes:
//
//   - a write holds what it adds before it reaches storage, under one lock, so
//     no two writes ever carry the same address;
//   - what it removes is given back only when storage said that the write is
//     done (the hooks of the generic store fire before an update is written,
//     so the storage wrapper does this, not they);
//   - when storage cannot say whether a write happened (a timeout), both stay
//     held;
//   - Run compares the pool with the stored services now and then. What is
//     stored but not held becomes held. What is held but was not stored in two
//     lists at least two minutes apart, untouched in between, is given back.
//
// So an error or a crash at any point can keep an address from use for a
// while, and can never give it out twice.
//
// # Several API servers
//
// The pool is per process. With more than one API server writing to the same
// storage each must own a disjoint part of the range for automatic choice, and
// a chosen or requested address must be claimed in storage in the same
// transaction as the Service (an IPAddress object per address, as Kubernetes
// has since 1.33). Neither is done here: let one API server at a time accept
// writes of services.
package serviceip
