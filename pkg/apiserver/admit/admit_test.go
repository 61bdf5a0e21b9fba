package admit

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	schedulinglisters "k8s.io/client-go/listers/scheduling/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"
)

// creating is the creation of pod in namespace n.
func creating(pod *corev1.Pod) admission.Attributes {
	return admission.NewAttributesRecord(pod, nil, corev1.SchemeGroupVersion.WithKind("Pod"), "n", pod.Name,
		schema.GroupVersionResource{Version: "v1", Resource: "pods"}, "", admission.Create, &metav1.CreateOptions{}, false, &user.DefaultInfo{Name: "u"})
}

func TestPriority(t *testing.T) {
	class := func(name string, value int32, def bool) *schedulingv1.PriorityClass {
		return &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Value: value, GlobalDefault: def}
	}
	none := []*schedulingv1.PriorityClass{class("high", 1000, false)}
	withDefault := append(none, class("usual", 7, true))
	for _, tc := range []struct {
		name    string
		classes []*schedulingv1.PriorityClass
		pod     corev1.PodSpec
		class   string
		want    int32
		err     string
	}{
		{"no class, no default", none, corev1.PodSpec{}, "", 0, ""},
		{"no class, a default", withDefault, corev1.PodSpec{}, "usual", 7, ""},
		{"a class", withDefault, corev1.PodSpec{PriorityClassName: "high"}, "high", 1000, ""},
		{"an unknown class", none, corev1.PodSpec{PriorityClassName: "x"}, "", 0, "no PriorityClass with name x was found"},
		{"a number of one's own", none, corev1.PodSpec{Priority: ptr.To[int32](5)}, "", 0, "must not be provided in pod spec"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil)
			for _, c := range tc.classes {
				if err := store.Add(c); err != nil {
					t.Fatal(err)
				}
			}
			pod := &corev1.Pod{Spec: tc.pod}
			err := NewPriority(schedulinglisters.NewPriorityClassLister(store)).Admit(t.Context(), creating(pod), nil)
			switch {
			case tc.err != "":
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want %s", err, tc.err)
				}
			case err != nil:
				t.Error(err)
			case *pod.Spec.Priority != tc.want || pod.Spec.PriorityClassName != tc.class:
				t.Errorf("%s %d, want %s %d", pod.Spec.PriorityClassName, *pod.Spec.Priority, tc.class, tc.want)
			}
		})
	}
}

func TestDefaultClass(t *testing.T) {
	class := func(name string, second int64, marked bool) *storagev1.StorageClass {
		c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Unix(second, 0)}}
		if marked {
			c.Annotations = map[string]string{isDefaultClass: "true"}
		}
		return c
	}
	for _, tc := range []struct {
		name, want string
		all        []*storagev1.StorageClass
	}{
		{"none is marked", "", []*storagev1.StorageClass{class("a", 1, false)}},
		{"the newest", "b", []*storagev1.StorageClass{class("a", 1, true), class("b", 2, true), class("c", 3, false)}},
		{"the first name of one moment", "a", []*storagev1.StorageClass{class("b", 1, true), class("a", 1, true)}},
	} {
		got := ""
		if c := defaultClass(tc.all); c != nil {
			got = c.Name
		}
		if got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestLimits(t *testing.T) {
	list := func(s string) corev1.ResourceList {
		if s == "" {
			return nil
		}
		return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(s)}
	}
	for _, tc := range []struct {
		name                   string
		request, limit         string
		item                   corev1.LimitRangeItem
		wantRequest, wantLimit string
		wrong                  string
	}{
		{"defaults where nothing is said", "", "", corev1.LimitRangeItem{Default: list("64Mi"), DefaultRequest: list("32Mi")}, "32Mi", "64Mi", ""},
		{"a limit is a request", "", "48Mi", corev1.LimitRangeItem{Default: list("64Mi"), DefaultRequest: list("32Mi")}, "48Mi", "48Mi", ""},
		{"over the maximum", "1Gi", "1Gi", corev1.LimitRangeItem{Type: "Container", Max: list("64Mi")}, "1Gi", "1Gi", "maximum memory usage per Container is 64Mi, but limit is 1Gi"},
		{"no limit where there is a maximum", "1Mi", "", corev1.LimitRangeItem{Type: "Container", Max: list("64Mi")}, "1Mi", "0", "maximum memory usage per Container is 64Mi, but limit is not set"},
		{"under the minimum", "1Mi", "8Mi", corev1.LimitRangeItem{Type: "Container", Min: list("4Mi")}, "1Mi", "8Mi", "minimum memory usage per Container is 4Mi, but request is 1Mi"},
		{"too far apart", "1Mi", "8Mi", corev1.LimitRangeItem{Type: "Container", MaxLimitRequestRatio: list("2")}, "1Mi", "8Mi", "memory max limit to request ratio per Container is 2, but limit is 8Mi and request is 1Mi"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := corev1.ResourceRequirements{Requests: list(tc.request), Limits: list(tc.limit)}
			complete(&r, tc.item)
			if got := r.Requests.Memory().String() + " " + r.Limits.Memory().String(); got != tc.wantRequest+" "+tc.wantLimit {
				t.Errorf("completed to %s", got)
			}
			if got := strings.Join(check(tc.item, r), ", "); got != tc.wrong {
				t.Errorf("got  %s\nwant %s", got, tc.wrong)
			}
		})
	}
}
