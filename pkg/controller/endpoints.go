package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/endpointslice"
	endpointsliceutil "k8s.io/endpointslice/util"
	"k8s.io/klog/v2"

	"meshd.dev/pkg/reconcile"
)

const (
	// endpointsManager marks the slices that are ours; the name Kubernetes uses.
	endpointsManager = "endpointslice-controller.k8s.io"
	// maxEndpoints of one EndpointSlice.
	maxEndpoints = 100
)

// endpoints keeps the EndpointSlices of services. What a slice contains is
// decided by the library Kubernetes' own controller is made of; the loop
// around it is ours, because that controller waits a second before it tries
// again whenever two changes come quickly after each other, and for that
// second traffic goes to pods that are gone.
type endpoints struct {
	plane     *plane
	services  corelisters.ServiceLister
	pods      corelisters.PodLister
	slices    discoverylisters.EndpointSliceLister
	informers []cache.SharedIndexInformer
	recorder  record.EventRecorder
	loop      *reconcile.Loop

	tracker *endpointsliceutil.EndpointSliceTracker
	trigger *endpointsliceutil.TriggerTimeTracker
	content *endpointslice.Reconciler

	mu    sync.Mutex
	dirty map[string]bool // services as namespace/name
}

func newEndpoints(p *plane) *endpoints {
	core, slices := p.shared.Core().V1(), p.shared.Discovery().V1().EndpointSlices()
	c := &endpoints{
		plane:     p,
		services:  core.Services().Lister(),
		pods:      core.Pods().Lister(),
		slices:    slices.Lister(),
		informers: []cache.SharedIndexInformer{core.Services().Informer(), core.Pods().Informer(), core.Nodes().Informer(), slices.Informer()},
		recorder:  p.recorder("endpoint-slice-controller"),
		tracker:   endpointsliceutil.NewEndpointSliceTracker(),
		trigger:   endpointsliceutil.NewTriggerTimeTracker(),
		dirty:     map[string]bool{},
	}
	c.content = endpointslice.NewReconciler(p.client, core.Nodes().Lister(), maxEndpoints, c.tracker, nil, c.recorder, endpointsManager,
		endpointslice.WithPreferSameTrafficDistributionEnabled(true))
	c.loop = p.loop("endpoints", c.do)
	c.handle(core.Services().Informer(), func(_, obj any) { c.mark(obj.(*corev1.Service).Namespace + "/" + obj.(*corev1.Service).Name) })
	c.handle(core.Pods().Informer(), c.podChanged)
	c.handle(slices.Informer(), c.sliceChanged)
	return c
}

// handle calls changed with the state before, nil for a new object, and the
// state after, or the last one known of an object that was deleted.
func (c *endpoints) handle(inf cache.SharedIndexInformer, changed func(old, obj any)) {
	_, _ = inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { changed(nil, obj) },
		UpdateFunc: changed,
		DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			if s, ok := obj.(*discoveryv1.EndpointSlice); ok && s.Labels[discoveryv1.LabelManagedBy] == endpointsManager {
				c.tracker.HandleDeletion(s)
			}
			changed(nil, obj)
		},
	})
}

// podChanged marks the services that select the pod, or did before.
func (c *endpoints) podChanged(old, obj any) {
	key := endpointsliceutil.GetPodUpdateProjectionKey(old, obj)
	if key == nil {
		return // nothing an endpoint would show
	}
	services, err := endpointsliceutil.GetServicesToUpdate(c.services, key)
	if err != nil {
		c.plane.cfg.Log.Warn("find services of pod", "err", err)
		return
	}
	c.mark(services.UnsortedList()...)
}

func (c *endpoints) sliceChanged(_, obj any) {
	s := obj.(*discoveryv1.EndpointSlice)
	if s.Labels[discoveryv1.LabelManagedBy] == endpointsManager && s.Labels[discoveryv1.LabelServiceName] != "" {
		c.mark(s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName])
	}
}

func (c *endpoints) mark(services ...string) {
	if len(services) == 0 {
		return
	}
	c.mu.Lock()
	for _, s := range services {
		c.dirty[s] = true
	}
	c.mu.Unlock()
	c.loop.Kick()
}

func (c *endpoints) Run(ctx context.Context) error {
	if !synced(ctx, c.informers...) {
		return nil
	}
	return c.loop.Run(ctx)
}

func (c *endpoints) do(ctx context.Context) error {
	c.mu.Lock()
	dirty := c.dirty
	c.dirty = map[string]bool{}
	c.mu.Unlock()
	var errs []error
	for key := range dirty {
		if ctx.Err() != nil {
			return nil
		}
		if err := c.sync(klog.FromContext(ctx), key); err != nil {
			errs = append(errs, fmt.Errorf("endpoints of service %s: %w", key, err))
			c.mu.Lock()
			c.dirty[key] = true
			c.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// sync makes the slices of one service what its pods are.
func (c *endpoints) sync(log klog.Logger, key string) error {
	namespace, name, _ := strings.Cut(key, "/")
	service, err := c.services.Services(namespace).Get(name)
	if err != nil { // gone; the garbage collector takes the slices
		c.trigger.DeleteService(namespace, name)
		c.content.DeleteService(namespace, name)
		c.tracker.DeleteService(namespace, name)
		return nil
	}
	if service.Spec.Type == corev1.ServiceTypeExternalName || service.Spec.Selector == nil {
		return nil // its slices, if any, are somebody else's
	}
	pods, err := c.pods.Pods(namespace).List(labels.SelectorFromSet(service.Spec.Selector))
	if err != nil {
		return err
	}
	ours := labels.Set{discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: endpointsManager}
	all, err := c.slices.EndpointSlices(namespace).List(labels.SelectorFromSet(ours))
	if err != nil {
		return err
	}
	var slices []*discoveryv1.EndpointSlice
	for _, s := range all {
		if s.DeletionTimestamp == nil {
			slices = append(slices, s)
		}
	}
	if c.tracker.StaleSlices(service, slices) {
		// The cache has not seen our last write. It will in a moment, and that
		// event kicks the loop again.
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dirty[key] = true
		return nil
	}
	since := c.trigger.ComputeEndpointLastChangeTriggerTime(namespace, service, pods)
	return c.content.Reconcile(log, service, pods, slices, since)
}
