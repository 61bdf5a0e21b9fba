package controller

import "context"

type nodeLifecycle struct{}

func newNodeLifecycle(*plane) *nodeLifecycle { return &nodeLifecycle{} }

func (*nodeLifecycle) Run(context.Context) error { return nil }
