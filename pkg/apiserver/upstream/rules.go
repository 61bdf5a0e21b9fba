package upstream

import (
	"fmt"
	"reflect"
	"sync"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Rules are the checks of one kind. Its functions take objects of k8s.io/api,
// after defaulting; a nil one checks nothing.
type Rules struct {
	Create func(obj runtime.Object) field.ErrorList
	Update func(obj, old runtime.Object) field.ErrorList
	Status func(obj, old runtime.Object) field.ErrorList
}

// RulesFor returns the rules of the type of obj, and whether there are any.
func RulesFor(obj runtime.Object) (Rules, bool) {
	r, ok := rules()[reflect.TypeOf(obj)]
	return r, ok
}

var rules = sync.OnceValue(func() map[reflect.Type]Rules {
	m := map[reflect.Type]Rules{}
	for _, table := range []map[runtime.Object]Rules{coreRules(), workloadRules(), otherRules()} {
		for obj, r := range table {
			m[reflect.TypeOf(obj)] = r
		}
	}
	return m
})

// object is a pointer to T that is an API object.
type object[T any] interface {
	*T
	runtime.Object
}

// rule makes Rules of functions over the internal type T.
func rule[T any, P object[T]](create func(P) field.ErrorList, update func(obj, old P) field.ErrorList, status func(obj, old P) field.ErrorList) Rules {
	r := Rules{}
	if create != nil {
		r.Create = func(obj runtime.Object) field.ErrorList {
			in := P(new(T))
			if err := convert(obj, in); err != nil {
				return cannotConvert(err)
			}
			return create(in)
		}
	}
	pair := func(check func(obj, old P) field.ErrorList) func(obj, old runtime.Object) field.ErrorList {
		if check == nil {
			return nil
		}
		return func(obj, old runtime.Object) field.ErrorList {
			in, inOld := P(new(T)), P(new(T))
			if err := convert(obj, in); err != nil {
				return cannotConvert(err)
			}
			if err := convert(old, inOld); err != nil {
				return cannotConvert(err)
			}
			return check(in, inOld)
		}
	}
	r.Update, r.Status = pair(update), pair(status)
	return r
}

func cannotConvert(err error) field.ErrorList {
	return field.ErrorList{field.InternalError(nil, fmt.Errorf("validate: %w", err))}
}
