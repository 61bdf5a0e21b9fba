package cni

import (
	"context"
	"errors"
)

// Report says what a sweep did. All empty means that nothing had to be done.
type Report struct {
	// Freed attachments: their namespace was gone, or they were of another boot.
	Freed []Record
	// Links of ours that no record knew, deleted.
	Links []string
	// Corrupt records that were set aside, by path.
	Corrupt []string
	// Kept counts the attachments that live on.
	Kept int
}

// SweepConfig says what to sweep.
type SweepConfig struct {
	// DataDir as in Network; every network in it is swept.
	DataDir string
	// DryRun only reports.
	DryRun bool
}

// Pods are the attachments recorded in dataDir, ordered by network, pod and
// interface. Corrupt records are left out and come back as an error beside
// the others. It changes nothing.
func Pods(dataDir string) ([]Record, error) { return nil, errors.ErrUnsupported }

// Sweep gives back what died without a DEL.
func Sweep(ctx context.Context, cfg SweepConfig, live func(Record) bool) (Report, error) {
	return Report{}, errors.ErrUnsupported
}
