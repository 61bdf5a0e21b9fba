package node

import (
	"context"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// known is the Node object as the API told or took it last; nil: it has to be
// asked for. It is looked at every few seconds, so a watch tells of what others
// write into it, and each node would else ask hundreds of times an hour.
type known struct {
	object *v1.Node
	asked  time.Time
}

// askEvery is how old an answer may become though no event came.
const askEvery = sayEvery

// know the object from now on. An event that tells of less than what was
// written since costs one more write, which changes nothing.
func (n *Node) know(obj *v1.Node, asked bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.known.object = obj
	if asked {
		n.known.asked = time.Now()
	}
}

// stillKnown is the object if it need not be asked for.
func (n *Node) stillKnown() *v1.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	if time.Since(n.known.asked) > askEvery {
		return nil
	}
	return n.known.object
}

// watch the node's own object until ctx ends.
func (n *Node) watch(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(n.cfg.Client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, n.cfg.Name).String()
	}))
	informer := factory.Core().V1().Nodes().Informer()
	tell := func(obj any) {
		if node, ok := obj.(*v1.Node); ok && node.Name == n.cfg.Name {
			n.know(node, false)
			n.loop.Kick()
		}
	}
	forget := func() {
		n.know(nil, false)
		n.loop.Kick()
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: tell, UpdateFunc: func(_, obj any) { tell(obj) }, DeleteFunc: func(any) { forget() }})
	if err != nil {
		return err
	}
	err = informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) { forget() })
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	<-ctx.Done()
	factory.Shutdown()
	return nil
}
