package controller

import (
	"context"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

type scheduler struct{}

func newScheduler(*plane, func(schema.GroupVersionResource) bool) *scheduler { return &scheduler{} }

func (*scheduler) Run(context.Context) error { return nil }
